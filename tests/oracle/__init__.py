"""The oracle suite: what every kind of adapter means, by closed forms and by PEFT's live models."""
