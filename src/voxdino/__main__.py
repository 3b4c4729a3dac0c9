"""python -m voxdino: the same as the command voxdino."""

from voxdino.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
