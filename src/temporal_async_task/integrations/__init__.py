"""What ties tasks to web applications, their databases and their frameworks."""
