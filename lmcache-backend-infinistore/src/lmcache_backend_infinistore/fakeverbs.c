/* For tests only: an RDMA device for a server that is used over TCP, on a machine without one.
 *
 * The server registers its memory with a device before it listens.  This answers just that; a
 * transfer over it is not possible.  Built and preloaded by warden.py, nowhere else.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct region {
    void *context, *domain, *address;
    size_t length;
    uint32_t handle, local_key, remote_key;
};

struct port {
    int state, max_mtu, active_mtu, gid_table_length;
    uint32_t capabilities, max_message, bad_keys, key_violations;
    uint16_t keys, lid, subnet_lid;
    uint8_t lid_mask, lanes, subnet_level, timeout, init_type, width, speed, physical, link_layer, flags;
};

enum { ACTIVE = 4, MTU_4096 = 5, INFINIBAND = 1 };

static char device[4096], context[4096];
static void *devices[2] = {device, 0};
static uint32_t next_key = 1;

void **ibv_get_device_list(int *count) {
    if (count) *count = 1;
    return devices;
}

void ibv_free_device_list(void **list) {}
const char *ibv_get_device_name(void *each) { return "fake0"; }
void *ibv_open_device(void *each) { return context; }
int ibv_close_device(void *each) { return 0; }

int ibv_query_port(void *each, uint8_t number, struct port *found) {
    found->state = ACTIVE;
    found->max_mtu = found->active_mtu = MTU_4096;
    found->lid = 1;
    found->link_layer = INFINIBAND;
    return 0;
}

int ibv_query_gid(void *each, uint8_t number, int index, void *gid) {
    memset(gid, 1, 16);
    return 0;
}

void *ibv_alloc_pd(void *each) {
    void **domain = calloc(4, sizeof *domain);
    if (domain) domain[0] = each;
    return domain;
}

int ibv_dealloc_pd(void *domain) {
    free(domain);
    return 0;
}

struct region *ibv_reg_mr(void *domain, void *address, size_t length, int access) {
    struct region *made = calloc(1, sizeof *made);
    if (!made) return NULL;
    made->context = context;
    made->domain = domain;
    made->address = address;
    made->length = length;
    made->local_key = made->remote_key = next_key++;
    return made;
}

int ibv_dereg_mr(struct region *each) {
    free(each);
    return 0;
}
