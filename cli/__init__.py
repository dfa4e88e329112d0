"""The commands. `main` builds the group; every command lives in a module that is imported late."""
