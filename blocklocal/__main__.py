"""Entry point of the command `bll` and of `python -m blocklocal`."""

import signal
import sys
from importlib.util import find_spec

LAB = (
    *("datasets", "matplotlib", "msgspec", "numpy", "pandas", "PIL", "pyarrow", "rich", "safetensors", "schedulefree"),
    *("sklearn", "tokenizers", "tyro"),
)


def main() -> int:
    """Run the command line. Returns the exit code: 0 success, 2 unusable arguments or data, 1 any other failure."""
    missing = [package for package in LAB if find_spec(package) is None]
    if missing:
        print(
            f"bll needs {', '.join(missing)}; install its requirements with: pip install 'blocklocal[lab]'",
            file=sys.stderr,
        )
        return 2
    from blocklocal.lab import cli
    from blocklocal.lab.terminal import flush_output, prepare_streams

    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    code = cli.main(sys.argv[1:])
    try:
        flush_output()
    except BrokenPipeError:
        return code or 1
    except OSError as error:
        print(f"bll: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
