"""Speed against named peers, in one run. Not part of the package."""
