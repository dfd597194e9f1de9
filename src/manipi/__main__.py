"""`python -m manipi` is `manipi`."""

from manipi.cli import main

# Worker processes import this module again; they must not run the command.
if __name__ == "__main__":
    main()
