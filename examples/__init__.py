"""Programs to run and to read, one for each question that a newcomer has: `docs/examples.md` lists them."""
