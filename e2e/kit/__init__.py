"""What the end-to-end tests are written with: a real mesh, a prober that hides nothing, checks behind each test.

A test file starts its mesh once, or once a test:

    mesh = module_mesh()                                    # one for all tests of the file, which then say so:
    pytestmark = pytest.mark.asyncio(loop_scope="module")

    async def test_a_killed_replica_costs_no_request(mesh: Mesh) -> None:
        async with mesh.prober("bookbuyer") as prober:
            await (await mesh.leader()).kill()
            await prober.until(3000)
        prober.assert_clean()
"""
