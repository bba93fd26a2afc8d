"""``python -m captioner`` is the command line."""

from captioner.cli import main

if __name__ == "__main__":
    main()
