"""Small experiments behind choices that the documentation explains; each is one file and one command."""
