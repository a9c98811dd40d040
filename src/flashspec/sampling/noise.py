"""What randomness is for. Purposes keep the draws of one text position disjoint; kernels.philox_* make the bits."""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    DRAFT = 0  # a drafter's own choice
    ACCEPT = 1  # the accept / reject uniform
    RECOVER = 2  # the recovered or the bonus token
    TOKEN = 3  # coupled sampling: drafter and target share it
