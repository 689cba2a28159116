"""`python -m keras_efficient.cli`"""

from keras_efficient.cli.app import main

if __name__ == "__main__":
    main()
