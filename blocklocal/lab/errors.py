"""What a person can put right: one line that says what, why, and what to do."""


class UserError(ValueError):
    """Unusable arguments or data. The command prints it in one line and exits with code 2."""
