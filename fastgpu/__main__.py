"""`python -m fastgpu`: the command, where it is not on the path."""

from fastgpu.cli import main

if __name__ == "__main__":
    main()
