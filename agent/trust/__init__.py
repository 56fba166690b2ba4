"""The TUF client, director documents and the device identity."""
