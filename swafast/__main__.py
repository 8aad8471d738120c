"""``python -m swafast``: the command line, and without arguments the doctor."""

import sys

if len(sys.argv) > 1:
    from .cli import app

    app(prog_name="python -m swafast")
else:
    from .doctor import main

    raise SystemExit(main())
