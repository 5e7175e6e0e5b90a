"""OpenAI's API: requests from JSON, and answers as JSON. Nothing here generates or opens a connection."""
