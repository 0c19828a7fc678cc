"""The command line `rookery`: parses, calls the rooms, prints."""
