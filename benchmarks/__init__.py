"""What `make bench` measures: this project beside what one would take instead, in turns.  See benchmarks/__main__.py."""
