"""Answers of the two kinds of master, written after captures (slapproxy 1.26) and ERP5's own tests."""

PROXY_COMPUTER = (
    '<marshal><object id="i2" module="slapos.slap.slap" class="Computer"><tuple><string>COMP-7</string></tuple>'
    '<dictionary id="i3"><string>_computer_id</string><string>COMP-7</string>'
    '<string>_computer_partition_list</string><list id="i4">'
    # a busy one
    '<object id="i5" module="slapos.slap.slap" class="ComputerPartition">'
    "<tuple><string>COMP-7</string><string>slappart0</string><none/></tuple>"
    '<dictionary id="i6"><string>_computer_id</string><string>COMP-7</string>'
    '<string>_connection_dict</string><dictionary id="i7"/>'
    "<string>_instance_guid</string><string>COMP-7-slappart0</string>"
    "<string>_need_modification</string><int>1</int>"
    '<string>_parameter_dict</string><dictionary id="i8"><string>greeting</string>'
    "<string>a&amp;lt;b&amp;gt; &amp;amp; &#233;</string>"
    '<string>full_address_list</string><list id="i9"/>'
    "<string>instance_title</string><string>hello</string>"
    '<string>ip_list</string><list id="i10"><tuple><string>slaptap0</string><string>10.0.3.4</string></tuple>'
    "<tuple><string>slaptap0</string><string>2001:db8:7::2</string></tuple></list>"
    "<string>root_instance_title</string><string>hello</string>"
    "<string>slap_computer_id</string><string>COMP-7</string>"
    "<string>slap_computer_partition_id</string><string>slappart0</string>"
    "<string>slap_software_release_url</string><string>/srv/hello/software.cfg</string>"
    "<string>slap_software_type</string><string>default</string>"
    '<string>slave_instance_list</string><list id="i11"><dictionary id="i12">'
    "<string>slave_title</string><string>_one</string><string>slave_reference</string><string>_one</string>"
    "<string>slap_software_type</string><string>default</string><string>k</string><string>v</string>"
    "</dictionary></list>"
    "<string>timestamp</string><string>1795362430.933656</string></dictionary>"
    "<string>_partition_id</string><string>slappart0</string><string>_request_dict</string><none/>"
    "<string>_requested_state</string><string>started</string><string>_software_release_document</string>"
    '<object id="i13" module="slapos.slap.slap" class="SoftwareRelease"><tuple>'
    "<string>/srv/hello/software.cfg</string><string>COMP-7</string></tuple>"
    '<dictionary id="i14"><string>_computer_guid</string><string>COMP-7</string>'
    '<string>_software_instance_list</string><list id="i15"/>'
    "<string>_software_release</string><string>/srv/hello/software.cfg</string></dictionary></object>"
    "</dictionary></object>"
    # a free one
    '<object id="i16" module="slapos.slap.slap" class="ComputerPartition">'
    "<tuple><string>COMP-7</string><string>slappart1</string><none/></tuple>"
    '<dictionary id="i17"><string>_computer_id</string><string>COMP-7</string>'
    "<string>_instance_guid</string><string>COMP-7-slappart1</string>"
    "<string>_need_modification</string><int>0</int>"
    "<string>_partition_id</string><string>slappart1</string><string>_request_dict</string><none/>"
    "<string>_requested_state</string><string>destroyed</string>"
    "<string>_software_release_document</string><none/></dictionary></object></list>"
    '<string>_software_release_list</string><list id="i18">'
    '<object id="i19" module="slapos.slap.slap" class="SoftwareRelease"><tuple>'
    "<string>/srv/hello/software.cfg</string><string>COMP-7</string></tuple>"
    '<dictionary id="i20"><string>_computer_guid</string><string>COMP-7</string>'
    "<string>_requested_state</string><string>available</string>"
    '<string>_software_instance_list</string><list id="i21"/>'
    "<string>_software_release</string><string>/srv/hello/software.cfg</string></dictionary></object></list>"
    "</dictionary></object></marshal>"
)

# Pretty-printed, int timestamps in microseconds, a routable IPv4, an SLA, an access status, a shared instance; the
# partitions come in reverse; the software list refers to the release of the partition.
PRODUCTION_COMPUTER = """<?xml version='1.0' encoding='UTF-8'?>
<marshal>
 <object id="i2" module="slapos.slap.slap" class="Computer">
  <tuple><string>COMP-123</string></tuple>
  <dictionary id="i3">
   <string>_computer_id</string><string>COMP-123</string>
   <string>_computer_partition_list</string>
   <list id="i4">
    <object id="i5" module="slapos.slap.slap" class="ComputerPartition">
     <tuple><string>COMP-123</string><string>slappart2</string></tuple>
     <dictionary id="i6">
      <string>_computer_id</string><string>COMP-123</string>
      <string>_need_modification</string><int>0</int>
      <string>_partition_id</string><string>slappart2</string>
      <string>_request_dict</string><none/>
      <string>_requested_state</string><string>destroyed</string>
      <string>_software_release_document</string><none/>
     </dictionary>
    </object>
    <object id="i7" module="slapos.slap.slap" class="ComputerPartition">
     <tuple><string>COMP-123</string><string>slappart1</string></tuple>
     <dictionary id="i8">
      <string>_access_status</string>
      <string>#error while instanciating: no &amp;lt;disk&amp;gt;</string>
      <string>_computer_id</string><string>COMP-123</string>
      <string>_connection_dict</string><dictionary id="i9"/>
      <string>_filter_dict</string>
      <dictionary id="i10"><string>retention_delay</string><string>7</string></dictionary>
      <string>_instance_guid</string><string>SOFTINST-42</string>
      <string>_need_modification</string><int>1</int>
      <string>_parameter_dict</string>
      <dictionary id="i11">
       <string>_</string><string>{"port": 80, "name": "caf&#233;"}</string>
       <string>full_ip_list</string>
       <list id="i12"><tuple>
        <string>route_slaptap1</string><string>198.51.100.9</string><string>198.51.100.1</string>
        <string>255.255.255.0</string><string>198.51.100.0</string>
       </tuple></list>
       <string>instance_title</string><string>Ma base de donn&#233;es</string>
       <string>ip_list</string>
       <list id="i13"><tuple><unicode>slaptap1</unicode><unicode>2001:db8:1::3</unicode></tuple></list>
       <string>root_instance_short_title</string><string/>
       <string>root_instance_title</string><string>Racine</string>
       <string>slap_computer_id</string><string>COMP-123</string>
       <string>slap_computer_partition_id</string><string>slappart1</string>
       <string>slap_software_release_url</string><string>https://lab.example/software.cfg?a=1&amp;amp;b=2</string>
       <string>slap_software_type</string><string>RootSoftwareInstance</string>
       <string>slave_instance_list</string>
       <list id="i14"><dictionary id="i15">
        <string>slave_title</string><string>Client</string>
        <string>slave_reference</string><string>SOFTINST-99</string>
        <string>slap_software_type</string><string>default</string>
        <string>timestamp</string><int>1785000000000001</int>
       </dictionary></list>
       <string>timestamp</string><int>1785000000123456</int>
      </dictionary>
      <string>_partition_id</string><string>slappart1</string>
      <string>_request_dict</string><none/>
      <string>_requested_state</string><string>destroyed</string>
      <string>_software_release_document</string>
      <object id="i16" module="slapos.slap.slap" class="SoftwareRelease">
       <tuple><string>https://lab.example/software.cfg?a=1&amp;amp;b=2</string><string>COMP-123</string></tuple>
       <dictionary id="i17">
        <string>_computer_guid</string><string>COMP-123</string>
        <string>_software_instance_list</string><list id="i18"/>
        <string>_software_release</string><string>https://lab.example/software.cfg?a=1&amp;amp;b=2</string>
       </dictionary>
      </object>
     </dictionary>
    </object>
   </list>
   <string>_software_release_list</string>
   <list id="i19"><reference id="i16"/></list>
  </dictionary>
 </object>
</marshal>
"""

PROXY_CERTIFICATE = (
    '<marshal><dictionary id="i2"><string>certificate</string><string></string>'
    "<string>key</string><string></string></dictionary></marshal>"
)
