"""``python -m benchmarks``: the suites of this clone, whichever diffcore is installed."""

from .runner import main

raise SystemExit(main())
