"""Extensions of Sphinx for the site: what pages have from elsewhere in the repository, and the reference."""
