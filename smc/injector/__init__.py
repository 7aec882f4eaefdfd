"""The Sidecar Injector: what makes an application's traffic pass its proxy without the application knowing."""
