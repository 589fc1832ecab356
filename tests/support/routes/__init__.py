"""The matrix of routes: cases, the routes that a call can take, and what is refused where."""
