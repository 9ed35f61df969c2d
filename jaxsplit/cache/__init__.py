"""What layers keep of the tokens they have seen."""
