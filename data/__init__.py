"""Data: sources are packed once into stores; training and testing read only stores. README.md here is the contract."""


class UserError(ValueError):
    """Something the user can mend. The message is one line that names the thing and the way out."""
