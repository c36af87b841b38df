"""Does joint training harm a domain, and does the mixture of experts end it? Runs, measurements and a verdict."""
