"""Jobs: files of requests in, answers out, each as it ends, and a journal to go on from."""
