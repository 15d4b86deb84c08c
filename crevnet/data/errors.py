"""The error of everything that reads data files."""


class DataError(ValueError):
    """A data file is missing, damaged or not what it should be; the message names the file and the fix."""
