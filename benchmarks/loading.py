"""The address that `python -m benchmarks.speed.loading` had in version 0.1."""

from benchmarks.speed.loading import main

if __name__ == "__main__":
    main()
