"""The TUF repository, signers, director documents and the device CA."""
