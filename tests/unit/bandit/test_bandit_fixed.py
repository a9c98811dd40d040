import pytest

from flashspec.bandit import FixedSelector


def test_plays_its_arm_unless_disabled():
    selector = FixedSelector(4, 2)
    assert {selector.select() for _ in range(5)} == {2}
    selector.disable(2)
    selector.disable(0)
    assert selector.select() == 1
    selector.enable(2)
    assert selector.select() == 2


@pytest.mark.parametrize("arm", [-1, 4, 1.0])
def test_bad_arm_raises(arm):
    with pytest.raises(ValueError, match="arm should be"):
        FixedSelector(4, arm)
