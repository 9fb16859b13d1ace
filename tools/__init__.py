"""What development and the demo need: environment, server, browser, and makers of templates and pictures."""
