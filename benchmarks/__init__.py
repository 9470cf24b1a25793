"""What `make bench` measures: this project beside what one would use instead.  See __main__.py."""
