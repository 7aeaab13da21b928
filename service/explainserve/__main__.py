"""`python -m explainserve`: the same as the command `explainserve`."""

from explainserve.cli import main

if __name__ == "__main__":
    main()
