"""From a question to a ranked list of candidates, a plan or a refusal. No torch of its own."""
