"""Data: sources are packed once into stores; training and testing read only stores. README.md here is the contract."""

import argparse
import sys


class UserError(ValueError):
    """Something the user can mend. The message is one line that names the thing and the way out."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, no usage text."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def run_script(main) -> None:
    """Run main(argv) as a script: what the user got wrong becomes one line on stderr and exit status 2."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:  # disk full, no permission, ...
        print(f"error: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
