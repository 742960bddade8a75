"""`python -m kvkern`: the command line."""

from kvkern.cli import main

if __name__ == "__main__":
    main()
