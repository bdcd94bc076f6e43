"""`python -m nc_audit`: the same as the `nc-audit` command."""

from nc_audit.cli import main

if __name__ == "__main__":
    main()
