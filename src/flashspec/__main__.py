"""`python -m flashspec` is `flashspec`."""

from flashspec.cli import main

if __name__ == "__main__":
    main()
