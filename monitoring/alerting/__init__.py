"""Who is told when a run needs a person: commands, mail, webhooks, and the look from outside at a silent run."""
