"""Entry of the command `bll` and of `python -m blocklocal`."""

import sys
from importlib.util import find_spec

LAB = ("datasets", "matplotlib", "msgspec", "numpy", "PIL", "pyarrow", "rich", "safetensors", "sklearn", "tyro")


def main() -> int:
    """Run the command line. Returns the exit code: 0 done, 2 unusable arguments or data, 1 anything else."""
    missing = [package for package in LAB if find_spec(package) is None]
    if missing:
        print(
            f"bll needs {', '.join(missing)}; install what it needs with: pip install 'blocklocal[lab]'",
            file=sys.stderr,
        )
        return 2
    from blocklocal.lab import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
