"""Results of evaluations and promotions: frozen dataclasses, which `json_form` converts to JSON and back."""
