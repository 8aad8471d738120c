"""``python -m swafast``: the doctor."""

from .doctor import main

raise SystemExit(main())
