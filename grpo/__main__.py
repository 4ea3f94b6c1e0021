"""`python -m grpo` is the `grpo` command."""

from grpo.cli import main

if __name__ == "__main__":
    main()
