"""A complete small application: pictures and videos of a paid, slow API, ordered on a page, made by durable tasks."""
