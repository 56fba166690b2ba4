"""OpenAI's shapes, and what they mean for the model. Pure: nothing here knows of HTTP."""
