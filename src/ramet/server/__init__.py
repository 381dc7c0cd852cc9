"""REST over `Verbs`. Plain HTTP/1.1: any client, proxy and curl can speak it."""
