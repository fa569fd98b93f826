"""`python -m nodes` is `ai-cluster`, for places where the script is not on the path."""

from nodes.cli import main

if __name__ == "__main__":
    main()
