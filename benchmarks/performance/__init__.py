"""How fast the library is, against the same work done in other ways on the same machine. Run it by scripts/bench."""
