"""The entry of the `tenon` command. Written so that an old Python can read it and say what is wrong.

It imports nothing until the Python version is known to do, and no `annotations` of the future: the oldest have none.
This module does not know any command.
"""

import sys

OLDEST_PYTHON = (3, 11)


def python_complaint(version):  # type: (tuple) -> str
    """What is wrong with a Python version, in the form of every error; empty when it will do."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return ""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return (
        "error[usage-python-version]: tenon needs Python {0} or newer\n"
        "  got:  Python {1}\n"
        "  hint: make an environment with a newer one: python{0} -m venv .venv\n"
    ).format(wanted, ".".join(map(str, version[:3])))


def main():  # type: () -> None
    """Run the command line and exit with its status."""
    complaint = python_complaint(sys.version_info)
    if complaint:
        sys.stderr.write(complaint)
        sys.exit(2)
    from tenon.cli.run import run_as_program

    sys.exit(run_as_program(sys.argv[1:]))


if __name__ == "__main__":
    main()
