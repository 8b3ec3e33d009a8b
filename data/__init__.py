"""Data: sources are packed once into stores; training and testing read only stores. README.md here is the contract."""
