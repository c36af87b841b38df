"""Does joint training harm a domain, and does a mixture of experts prevent it? Runs, measurements and a verdict."""
