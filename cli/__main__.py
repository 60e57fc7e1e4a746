"""`python -m pipeproof.cli`, where the script is not on the path."""

from pipeproof.cli.app import main

if __name__ == "__main__":
    main()
